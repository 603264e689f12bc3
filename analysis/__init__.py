"""Records to pages: tables, plots and one report, on a laptop, without torch or Ray."""
