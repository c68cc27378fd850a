"""What the rows of a study mean. One subject a file; which columns and axes it is about is configured."""
