"""Speed and its price in quality: bench, perplexity, roofline, reports."""
