# The hash table of counters, in threads of one process: what makes and deletes
# keys while others scan, under the thread sanitizer and under the address
# sanitizer.  The server's processes share memory in a way that these do not
# follow.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use Test::More;
use TestLibrary;

plan skip_all => 'nothing to build a program with' unless can_build_library();

my $source = "$FindBin::RealBin/../src";
my $seed = int(rand(1_000_000));

foreach my $sanitizer ('thread', 'address,undefined', '')
{
	my @options = $sanitizer ? ("-fsanitize=$sanitizer", '-fno-sanitize-recover=all') : ();
	my $what = $sanitizer ? "$sanitizer sanitizer" : 'no sanitizer';

  SKIP:
	{
		# The compiler may not have it, or the system may not let it run.
		skip "$what: not to be had here", 1
		  if $sanitizer && !runs(build_program('trivial', \@options, $source, 'int main(void) { return 0; }'));

		my $program = build_program('hashtable_test', [ '-DUSE_ASSERT_CHECKING=1', @options ], $source,
			"$FindBin::RealBin/threads/hashtable_test.c", "$source/hashtable.c");
		my ($out, $err) = run_command([ $program, $seed ]);
		like($out, qr/^passed: \d+ scans/m, "$what: seed $seed") or diag("$out\n$err");
	}
}

sub runs
{
	my ($program) = @_;

	return defined $program && system("'$program' >/dev/null 2>&1") == 0;
}

done_testing();
