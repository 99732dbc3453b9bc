"""What all other rooms use: names, the formula, errors, files, progress."""
