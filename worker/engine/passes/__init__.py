"""Passes: how losses and gradients of rows are computed, padded or lean, alone or beside others. No optimizer."""
