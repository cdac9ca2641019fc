"""What everything else uses: clock, checks, dates and deadlines."""
