"""`gearshift bench`: open-loop load against a running server, and an honest account of what came back."""
