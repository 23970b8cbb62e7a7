"""Picture quality of every method and width: measured, tabled, plotted."""
