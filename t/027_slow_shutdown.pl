# The server stops though handlers never come back, in the time that the buffers
# and the settings allow; and nothing is lost.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use SlowTest;
use StatbufferTest;
use Test::More;

my $db = 'postgres';

# Handlers sleep and run in circles in several buffers, and one does not let
# itself be cancelled.  The server stops all the same: after "shutdown", and
# for "shutdown" 0 at once; whatever it says, not later than the setting
# "statbuffer.max_shutdown" allows.  The hour that they want to take is longer
# than pg_ctl waits.
for my $preloaded (0, 1)
{
	for my $shutdown ('1s', '0', '1d')
	{
		for my $mode (qw(fast smart))
		{
			my $how = ($preloaded ? 'preloaded' : 'not preloaded') . ", shutdown $shutdown, $mode";
			my $name = join '_', 'stop', $preloaded, $shutdown, $mode;

			next if $mode eq 'smart' && $shutdown ne '1s';
			my $node = new_node($name, 'statbuffer.max_workers = 12',
				"statbuffer.max_shutdown = '" . ($shutdown eq '1d' ? '1s' : '1h') . q{'},
				$preloaded ? q{shared_preload_libraries = 'statbuffer'} : '');
			$node->safe_psql($db, $definitions);
			$node->safe_psql($db, q{
				INSERT INTO manners VALUES ('sleep', 'sleep'), ('loop', 'loop'), ('catch', 'catch 1000000')});
			for my $manner (qw(sleep loop catch))
			{
				make_slow($node, $db, "b_$manner", 'one key', qq{shutdown '$shutdown'});
				$node->safe_psql($db, qq{
					INSERT INTO b_$manner VALUES ('good', 1);
					SELECT sb_drain('b_$manner');
					INSERT INTO b_$manner VALUES ('$manner', 10)});
				wait_for($node, $db, "SELECT in_flight = 10 FROM sb_stat_buffers WHERE relid = 'b_$manner'::regclass", "$how: a handler is at work ($manner)");
				$node->safe_psql($db, "INSERT INTO b_$manner VALUES ('waits', 100)");
			}

			# Preloaded, the workers are asked to leave before.
			if ($mode eq 'fast')
			{
				make_elsewhere($node, $shutdown);
				in_time($node, $db, 'DROP DATABASE elsewhere WITH (FORCE)');
				pass("$how: DROP DATABASE ... WITH (FORCE), too, does not wait for a handler");
			}

			# Those that are at work have seen it; the next server's behave.
			$node->safe_psql($db, 'DELETE FROM manners');
			local $ENV{PGCTLTIMEOUT} = 60;
			ok($node->stop($mode, fail_ok => 1), "$how: the server stops, whatever handlers do")
			  or $node->stop('immediate');
			$node->start;

			# What was in flight, and what waited behind it, is stored then.
			for my $manner (qw(sleep loop catch))
			{
				increment($node, $db, "b_$manner", 'after', 1000);
				wait_for_sum($node, $db, "b_$manner", 1111, "$how: nothing is lost ($manner)");
				is_stored($node, $db, "b_$manner", '4|4|1111', "$how: and nothing stored twice");
			}
			$node->stop;
		}
	}
}

done_testing();
