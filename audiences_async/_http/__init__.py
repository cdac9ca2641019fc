"""One HTTP exchange: the wire, its connections and its errors."""
