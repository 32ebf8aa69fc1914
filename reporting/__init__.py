"""From result files to tables, figures and one page; nothing here needs torch, and matplotlib is for figures alone."""
