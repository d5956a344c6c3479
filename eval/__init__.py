"""Speed beside the quality that was paid for it: bench, perplexity, roofline, reports."""
