"""This library's indexers inside other projects' models and engines, a module each."""
