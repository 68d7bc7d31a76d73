"""A trained recommender behind HTTP, with one page that shows what its stages recommend."""
