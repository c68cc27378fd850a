"""What `millrace evaluate` is made of: sets of pictures, and metrics that see them pass by."""
