"""Libraries that single recipes are built on: too large for a recipe's folder, too special for the
engine in posttrain/.
"""
