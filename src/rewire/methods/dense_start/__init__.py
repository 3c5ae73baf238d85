"""Methods that train ordinary dense layers and end in sparse ones: HALO and ternary."""
