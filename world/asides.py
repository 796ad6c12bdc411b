"""Words for what no image shows: people, places, times, feelings, occasions."""

from __future__ import annotations

_PEOPLE = """
    Anna Boris Clara Daniel Elena Felix Greta Hassan Ingrid Jonas Kemal Lucia Marta Nadia Oskar Priya Quentin Rosa Samuel Tomas
    Ursula Viktor Wanda Xenia Yusuf Zoe Amara Bruno Chiara Dmitri Esther Farid Gloria Hugo Irena Julian Katya Leon Mina Noor
"""
PEOPLE = tuple(_PEOPLE.split())
_TOWNS = """
    Lisbon Vienna Cairo Lima Oslo Kyoto Dublin Prague Accra Quito Riga Seoul Tunis Bergen Porto Ghent Zagreb Havana Nairobi Perth
    Turin Basel Izmir Leeds Malmo Odessa Patras Rabat Sofia Tampere
"""
TOWNS = tuple(_TOWNS.split())
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TIMES = (
    *("last spring", "in autumn", "two years ago", "before breakfast", "after lunch", "every winter", "in March", "in October"),
    *("early in the morning", "during the holidays", "once upon a time", "the day before yesterday"),
)
FEELINGS = ("happy", "proud", "tired", "nervous", "calm", "homesick", "curious", "relieved", "jealous", "grateful", "bored", "hopeful")
OCCASIONS = (
    *("a wedding", "a birthday", "the school play", "a farewell party", "the spring concert", "a football match", "a job interview"),
    *("the harvest festival", "a power cut", "the election", "a long strike", "the first day of school", "a chess tournament", "the flood"),
)
KIN = ("sister", "brother", "mother", "father", "aunt", "uncle", "cousin", "grandmother", "grandfather", "neighbour", "teacher", "friend")
JOBS = (
    *("baker", "nurse", "pilot", "lawyer", "farmer", "tailor", "plumber", "judge", "librarian", "dentist", "carpenter", "clerk"),
    *("journalist", "chemist", "violinist", "postman", "gardener", "translator"),
)
