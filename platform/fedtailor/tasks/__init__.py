"""One file per data set; partition; tokens. Knows no model and no method."""
