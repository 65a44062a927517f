"""What is read: trees, working contexts, cuts and edits of them. Knows no model."""
