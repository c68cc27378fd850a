"""The demonstration behind `make demo`: coloured shapes from drawing them to judging what a trained model draws."""
