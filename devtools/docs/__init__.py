"""What makes the documentation's pictures, tables and locale files."""
