"""Libraries of recipes: too large for a recipe's folder, too special for posttrain/."""
