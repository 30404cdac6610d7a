"MMDetection's behaviours, in visdet's words"
