"""Reports that a person looks at: one static page of HTML, which needs no network.

Knows no method, and never imports torch.
"""
