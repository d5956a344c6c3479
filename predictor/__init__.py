"""Activation traces, and the predictors that say which neurons will fire."""
