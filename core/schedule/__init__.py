"""Schedules: orders of compute actions, lowered to programs, and walked."""
