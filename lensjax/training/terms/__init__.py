"""What the scores of scored variants are asked to agree with: preference terms."""
