// What the programs share: telling what they see, and ending with an error.

exports.seen = (what, value) => console.log(`${what}: ${value}`);

exports.run = (main) => main().catch((error) => {
  console.error(error);
  process.exit(1);
});
