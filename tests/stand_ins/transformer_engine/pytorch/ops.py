"""The op fuser's classes are looked up when they are used, which no test does."""
