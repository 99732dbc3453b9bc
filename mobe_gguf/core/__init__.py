"""What everything else stands on: names, the formula, errors, files, progress."""
