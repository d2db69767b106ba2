"""Where does the weight of now come from?"""
