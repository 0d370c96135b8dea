"""One outside thing each: none of these modules imports another."""
