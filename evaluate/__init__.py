"""How good a student is, in numbers and in images: metrics as pure functions, and the command that runs them."""
