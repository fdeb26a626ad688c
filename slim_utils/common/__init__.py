"""What every room of the suite uses: loading, checks of input, output folders, errors."""
