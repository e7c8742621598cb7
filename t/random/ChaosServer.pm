# The server of the chaos test: how it is started and stopped, and what its log
# tells.

package ChaosServer;

use strict;
use warnings;

use ChaosActions;
use ChaosLoad;
use Exporter 'import';
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(time usleep);

our @EXPORT = qw(
  $preload $lives @crashes @complaints
  write_settings start_server read_log rotate_log complete_stop random_stop
);

# Is the library preloaded?  "yes" or "no", or nothing: as it comes.
our $preload = '';

# How often the server was started.
our $lives = 0;

# Lines of the log that should not be there.
our @crashes;
our @complaints;

my $is_preloaded;
my $log_read = 0;
my $former_log;

# write_settings(WORKERS): the settings that change, with this limit of workers.
sub write_settings
{
	my ($workers) = @_;
	my $file = $node->data_dir . '/chaos.conf';

	open(my $conf, '>', $file) or die "$file: $!";
	print $conf "shared_preload_libraries = 'statbuffer'\n" if $is_preloaded;
	print $conf "statbuffer.max_workers = $workers\n";
	close $conf;
	return;
}

sub start_server
{
	$is_preloaded =
	    $preload eq 'yes' ? 1
	  : $preload eq 'no' ? 0
	  : int rand 2;
	write_settings(2 + int rand 10);
	record('start, ' . ($is_preloaded ? 'preloaded' : 'not preloaded'));
	$node->start;
	$lives++;
	$done{ $is_preloaded ? 'starts, preloaded' : 'starts, not preloaded' }++;
	return;
}

# Looks at what the server's log says since the last time.  Counts deadlocks
# that workers found themselves in.
sub read_log
{
	my $text = slurp_file($node->logfile, $log_read) =~ s/[^\n]*\z//r;

	$log_read += length $text;
	$done{'deadlocks in workers'} +=
	  () = $text =~ /statbuffer worker .*detected deadlock/g;
	push @crashes, grep {
		/PANIC|TRAP|was terminated by signal|all server processes terminated|server process .* exited with exit code [^01]/
	} split /\n/, $text;

	# what a handler raises is told otherwise
	push @complaints, grep { /statbuffer (?:launcher|worker) .*(?:WARNING|ERROR):/ }
	  split /\n/, $text;
	return;
}

# A new one while the server is stopped; that of the last life stays.
sub rotate_log
{
	read_log();
	unlink $former_log if defined $former_log;
	$former_log = $node->logfile;
	$node->rotate_logfile;
	$log_read = 0;
	return;
}

# Processes of the server that are ours, as the operating system tells, and
# not for long: a process is known to be of this server by its parent.
sub our_processes
{
	my $pid_file = $node->data_dir . '/postmaster.pid';
	my @found;
	my $postmaster;

	open(my $file, '<', $pid_file) or return;
	chomp($postmaster = <$file> // '');
	close $file;
	return if $postmaster !~ /^\d+$/;

	foreach my $dir (glob '/proc/[0-9]*')
	{
		my ($stat, $command);

		open(my $in, '<', "$dir/stat") or next;
		$stat = <$in> // '';
		close $in;
		next if $stat !~ /^(\d+) \(.*\) \S (\d+) / || $2 != $postmaster;
		push @found, $1;
		open($in, '<', "$dir/cmdline") or next;
		$command = <$in> // '';
		close $in;
		pop @found if $command !~ /statbuffer (?:launcher|worker)/;
	}
	return @found;
}

# --- stops ------------------------------------------------------------------

# Terminates and cancels what there is of ours, in a server that is stopping.
sub strike_while_stopping
{
	my ($until) = @_;

	while (time < $until && -e $node->data_dir . '/postmaster.pid')
	{
		foreach my $pid (our_processes())
		{
			next if rand() < 0.5;
			$done{'struck while the server stopped'} +=
			  kill(any('TERM', 'INT'), $pid);
		}
		usleep(int rand 50_000);
	}
	return;
}

# Stops the server, which may be stopping already.
sub complete_stop
{
	my ($mode) = @_;

	foreach my $attempt (1 .. 3)
	{
		$node->stop($mode, fail_ok => 1);
		return if !-e $node->data_dir . '/postmaster.pid';
	}
	BAIL_OUT('the server does not stop');
	return;
}

# Has it stop, and does not wait for that.
sub begin_stop
{
	my ($mode) = @_;

	system_log('pg_ctl', '-D', $node->data_dir, '-m', $mode, '-W', 'stop');
	return;
}

# Each with how often it happens, in relation to the others.
my @stops = (
	[
		'fast',
		4,
		sub { complete_stop('fast') }
	],
	[
		'fast, just after the launcher was terminated',
		2,
		sub {
			strike('launchers terminated', 'pg_terminate_backend', $is_launcher);
			usleep(int rand 100_000) if int rand 2;
			complete_stop('fast');
		}
	],
	[
		'fast, while ours are terminated and cancelled',
		3,
		sub {
			begin_stop('fast');
			strike_while_stopping(time + rand 3);
			complete_stop('fast');
		}
	],
	[
		# nobody is left who knows of the counts
		'fast, just after everybody of ours was terminated',
		1,
		sub {
			end_clients();
			sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity
				 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()");
			strike('launchers terminated', 'pg_terminate_backend', $is_launcher);
			foreach my $attempt (1 .. 20)
			{
				last if !strike('workers terminated',
					'pg_terminate_backend', "$is_worker OR $is_launcher", 20);
				usleep(20_000);
			}
			usleep(int rand 100_000) if int rand 2;
			complete_stop('fast');
		}
	],
	[
		'smart',
		1,
		sub {
			begin_stop('smart');
			usleep(int rand 1_500_000);
			end_clients();
			complete_stop('smart');
		}
	],
	[
		'smart, while ours are terminated and cancelled',
		1,
		sub {
			begin_stop('smart');
			strike_while_stopping(time + rand 1);
			end_clients();
			strike_while_stopping(time + rand 1);
			complete_stop('smart');
		}
	],
	[
		'smart, then fast',
		1,
		sub {
			begin_stop('smart');
			usleep(int rand 1_000_000);
			complete_stop('fast');
		}
	]);

# How to stop it this time: what that is called, and a function.
sub random_stop
{
	my ($how, undef, $stop) = @{ any(map { ($_) x $_->[1] } @stops) };

	return ($how, $stop);
}

1;
