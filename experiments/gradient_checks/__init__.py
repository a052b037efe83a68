"""What `compare_gradients` compares, explains and draws."""
