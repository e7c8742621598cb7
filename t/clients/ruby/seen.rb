# What the programs share: telling what they see.
def seen(what, value)
  puts "#{what}: #{value}"
  $stdout.flush
end
