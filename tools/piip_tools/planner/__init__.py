"""Plans pyramids for a budget: candidates with their cost, the paper's guidelines as rules, measurements, a figure."""
