"""Decorators, handles and the client. Import them from `woodfrog` itself."""
