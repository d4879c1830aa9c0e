"""An attempt's link to its trainer, whose process it may share with others. No row and no order is made here."""
