"""`gearshift report`: one self-contained page with pictures of what a build proved and measured."""
