"""How good a student is, in numbers and in pictures: metrics as pure functions, and the command that runs them."""
