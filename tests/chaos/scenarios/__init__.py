"""
What is broken, and how often: at each push, and in the full run.
"""
