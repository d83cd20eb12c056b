"""What a model does on data: pieces of it in batches, second moments, damage as one number, and spending a budget on it."""
