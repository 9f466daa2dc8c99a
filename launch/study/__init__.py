"""`reblock study`: repeats findings about attention on any checkpoint, with their controls."""
