"""Pairs for preference training: candidates drawn from a model, labelled, written in TRL's form."""
