"""What rewriting by models is made of: their questions, their roles, the attack, and what texts are worth.

Knows no method, family, task, provider or file.
"""
