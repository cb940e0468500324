"""Prices: quotes, records, the rule, signatures, documents, the polling of sources, publishing."""
