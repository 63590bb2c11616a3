"""Write a trained student in the formats of other libraries."""
