"""Pace of accounts and of the service: limits, load and outages."""
