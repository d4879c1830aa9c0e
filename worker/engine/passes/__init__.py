"""Passes: how losses and gradients of rows are computed, padded or lean, alone or with others. No optimizer."""
