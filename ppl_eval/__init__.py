"""Evaluation: perplexity on wikitext2, ptb and local text, and zero-shot tasks."""
