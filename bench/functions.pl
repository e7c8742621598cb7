# What callgrind_annotate prints, as CSV: who took how many instructions for
# each of N.  Arguments: what was measured, with whom, and N.

use strict;
use warnings;

my ($what, $who, $n) = @ARGV;

while (my $line = <STDIN>)
{
	# instructions (share)  file:function [library]
	my ($instructions, $function, $library) = $line =~ m{
		^ \s* ([\d,]+) \s+ (?: \( [^)]* \) \s+ )?
		\S*? : ([^:\s]+) (?: \s+ \[ (?: .*/ )? ([^\]/]+) \] )? \s* $ }x
	  or next;
	$instructions =~ tr/,//d;
	$library ||= 'postgres';
	$library =~ s/\.so[\d.]*$//;
	printf "%s,%s,%s,%s,%.2f\n", $what, $who, $library, $function,
	  $instructions / $n
	  if $instructions / $n >= 0.5;
}
