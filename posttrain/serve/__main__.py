from posttrain.serve.command import main

main()
